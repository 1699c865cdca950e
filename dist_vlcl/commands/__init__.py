"""The commands beside training, each started as `dist-vlcl NAME` or `python -m dist_vlcl.commands.NAME`."""
