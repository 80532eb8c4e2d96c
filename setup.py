"""What setup.cfg cannot say: a package without __init__.py beside the packages that are found."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["dockerproxy", "dockerproxy.*"]), "twisted.plugins"])
