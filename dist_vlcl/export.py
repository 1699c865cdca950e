"""`python -m dist_vlcl.export` is `dist-vlcl export`."""

from dist_vlcl.commands.export import main

if __name__ == "__main__":
    main()
