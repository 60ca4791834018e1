"""make_goldens.py needs torch, so it is not looked into for doctests."""

collect_ignore = ["make_goldens.py"]
