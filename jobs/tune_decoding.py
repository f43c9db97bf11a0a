"""`heliostat tune-decoding` as a job: `ray job submit --working-dir . -- python jobs/tune_decoding.py CONFIG`."""

import sys

# The checkout's library, if it is there, in the place of this folder, whose files would hide modules of their names.
sys.path[0] = sys.path[0].removesuffix("jobs") + "platform"

from heliostat.cli import main  # noqa: E402

sys.exit(main(["tune-decoding", *sys.argv[1:]]))
