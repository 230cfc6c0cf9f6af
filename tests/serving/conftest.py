from models import made  # noqa: F401
from ram import tmp_path  # noqa: F401
