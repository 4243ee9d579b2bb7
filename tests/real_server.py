"""A server without HTTP for tests/test_resume.py: takes the one job of FOLDER/spec.json and looks after it."""

import sys
import threading
from pathlib import Path

from lora_mvp.api.engines import LocalEngine
from lora_mvp.api.jobs import JobSpec
from lora_mvp.api.ownership import open_jobs
from lora_mvp.api.service import Service
from lora_mvp.config import load_config

folder = Path(sys.argv[1])
config = load_config(folder / "config.yaml")
service = Service(config, open_jobs(config.api), LocalEngine(config.api), backoff=0.1)
if not service.page():
    service.submit("train", JobSpec.model_validate_json((folder / "spec.json").read_text()))
service.start()
threading.Event().wait()
