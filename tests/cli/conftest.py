from ram import tmp_path  # noqa: F401
