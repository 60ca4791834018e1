"""The scripts here import torch and are run by hand."""

collect_ignore_glob = ["make_*.py"]
