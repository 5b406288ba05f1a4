"""What pytest leaves out where an extra is not installed."""

from importlib.util import find_spec

# These two need gradio, which is not among the packages for developers; `make test-app` tests them.
collect_ignore = [] if find_spec("gradio") else ["visual_ground/app/page.py", "visual_ground/app/web.py"]
