"""Package definition. Every value comes from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
package = cfg["lib_name"]
site = f"{cfg['doc_host']}{cfg['doc_baseurl']}/"

setup(
    name=cfg["repo"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=site,
    project_urls={
        "Documentation": site,
        "Source": cfg["git_url"],
        "Changelog": f"{site}CHANGELOG.html",
        "Issues": f"{cfg['git_url']}/issues",
    },
    classifiers=[line for line in cfg["classifiers"].split("\n") if line],
    keywords=cfg["keywords"],
    license=cfg["license"],
    license_files=["LICENSE"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[package, f"{package}.*"]),
    package_data={package: ["assets/**", "py.typed"]},
    install_requires=cfg["requirements"].split(),
    extras_require={
        "dev": cfg["dev_requirements"].split(),
        "postgres": cfg["postgres_requirements"].split(),  # api.db_path: postgresql+pg8000://...
        "heic": cfg["heic_requirements"].split(),
        "eval-offline": cfg["eval_offline_requirements"].split(),
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{package}={package}._modidx:d"],  # turns backticks in the docs into links
    },
    zip_safe=False,
)
