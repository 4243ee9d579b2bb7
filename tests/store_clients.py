"""What test_stores.py runs in processes of its own; it imports little, so that each begins at once."""

import os
from concurrent.futures import ThreadPoolExecutor

from lora_mvp.api import state_file
from lora_mvp.api.jobs import Job, JobIds, JobSpec, now, transition
from lora_mvp.api.stores import open_store
from lora_mvp.config import ApiConfig, LoraMvpError

new_id = JobIds()


def example(**fields) -> Job:
    """A new job."""
    spec = JobSpec(manifest="cats/manifest.json", config={"training.max_train_steps": 20})
    return Job(**({"id": new_id(), "kind": "train", "spec": spec, "created_at": now(), "updated_at": now()} | fields))


def submit_until_killed(url: str, answered: str) -> None:
    """Create, change and delete jobs from four threads; note what the store has answered."""
    state_file.LEAST_JOURNAL = 4000  # so that all jobs are written anew again and again
    store = open_store(ApiConfig(db_path=url))
    file = os.open(answered, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def work(_):
        for k in range(10_000):
            job, _ = store.create(example())
            os.write(file, f"{job.id} 0\n".encode())
            for _ in range(2):
                job = transition(store, job, "starting" if job.status == "queued" else "queued")
                os.write(file, f"{job.id} {job.version}\n".encode())
            if k % 4 == 0:
                store.delete(job.id)
                os.write(file, f"{job.id} gone\n".encode())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def open_and_say(url: str, out) -> None:
    try:
        open_store(ApiConfig(db_path=url))
        out.send("opened")
    except LoraMvpError as error:
        out.send((error.code, error.message))
