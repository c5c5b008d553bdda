"""Packages of the distribution: ``routed_peft``, and the folders of ``evals/`` as sub-packages of it.

They are listed here and not in pyproject.toml, for setuptools finds packages only where their folders have their names.
"""

from setuptools import find_packages, setup

FOLDERS = {"routed_peft.tasks": "evals", "routed_peft.corpora": "evals/corpora"}

setup(packages=[*find_packages(include=["routed_peft", "routed_peft.*"]), *FOLDERS], package_dir=FOLDERS)
