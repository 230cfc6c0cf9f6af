from models import made  # noqa: F401
