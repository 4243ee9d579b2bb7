"""Package definition. Every value comes from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
package = cfg["lib_name"]
site = f"{cfg['doc_host']}{cfg['doc_baseurl']}/"
EXTRAS = ("service", "notebook", "postgres", "ray", "heic", "optimizers", "tensorboard", "wandb", "eval-offline")
extras = {name: cfg[f"{name.replace('-', '_')}_requirements"].split() for name in EXTRAS}


class WithTutorials(build_py):
    """The tutorials and their pictures go into the package, for `lora-mvp lab`."""

    def run(self):
        super().run()
        for part in ("tutorials", "images"):
            target = Path(self.build_lib, package, "assets", "notebooks", part)
            for file in (here / "nbs" / part).glob("[!.]*.*"):
                self.mkpath(str(target))
                self.copy_file(str(file), str(target))


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
    extras_require=extras
    | {
        "all": sorted(set().union(*extras.values())),
        "dev": cfg["dev_requirements"].split() + extras["service"] + extras["notebook"],
    },
    cmdclass={"build_py": WithTutorials},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{package}={package}._modidx:d"],  # turns backticks in the docs into links
    },
    zip_safe=False,
)
