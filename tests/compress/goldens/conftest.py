"""The script here imports qwix and is run by hand."""

collect_ignore_glob = ["make_*.py"]
