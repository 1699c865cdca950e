"""The commands beside training, each started as `dist-vlcl NAME` or `python -m dist_vlcl NAME`."""

import sys

if sys.argv[0] == "-m":  # Python sets this while `python -m dist_vlcl.commands.NAME` imports the package
    sys.exit("error: start a command as dist-vlcl NAME; dist-vlcl lists them")
