"""The commands beside training, each started as `dist-vlcl NAME` or `python -m dist_vlcl NAME`."""

import sys

if sys.argv[:1] == ["-m"] and any("dist_vlcl.commands." in word for word in sys.orig_argv):  # python -m dist_vlcl.commands.NAME
    print("error: start a command as dist-vlcl NAME; dist-vlcl lists them", file=sys.stderr)
    sys.exit(2)
