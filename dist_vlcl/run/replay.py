"""The name that version 0.1 had for dist_vlcl.commands.replay; it goes with version 0.3."""

from dist_vlcl.commands.replay import main

if __name__ == "__main__":
    main()
