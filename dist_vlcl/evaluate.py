"""The name that version 0.1 had for dist_vlcl.commands.evaluate; it goes with version 0.3."""

from dist_vlcl.commands.evaluate import main

if __name__ == "__main__":
    main()
