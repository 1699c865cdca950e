"""The same as `dist-vlcl export`:  python -m dist_vlcl.export --help"""

from dist_vlcl.commands.export import main

if __name__ == "__main__":
    main()
