"""Packages of the distribution: ``routed_peft``, and the folders of ``evals/`` under names of their own."""

from setuptools import find_packages, setup

FOLDERS = {"routed_peft.tasks": "evals", "routed_peft.corpora": "evals/corpora"}

setup(packages=[*find_packages(include=["routed_peft", "routed_peft.*"]), *FOLDERS], package_dir=FOLDERS)
