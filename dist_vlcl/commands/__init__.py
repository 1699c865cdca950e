"""The commands beside training, each started as python -m dist_vlcl.commands.NAME."""
