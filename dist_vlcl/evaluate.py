"""`python -m dist_vlcl.evaluate` is `dist-vlcl evaluate`."""

from dist_vlcl.commands.evaluate import main

if __name__ == "__main__":
    main()
