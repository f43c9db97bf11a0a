"""`heliostat promote` as a job: `ray job submit --working-dir . -- python jobs/promote.py NAME|CONFIG`."""

import sys

# The checkout's library, if it is there, in the place of this folder, whose files would hide modules of their names.
sys.path[0] = sys.path[0].removesuffix("jobs") + "platform"

from heliostat.cli import main  # noqa: E402

sys.exit(main(["promote", *sys.argv[1:]]))
