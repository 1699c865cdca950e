"""`python -m dist_vlcl.tune` is `dist-vlcl tune`."""

from dist_vlcl.commands.tune import main

if __name__ == "__main__":
    main()
