"""The same as `dist-vlcl predict`:  python -m dist_vlcl.predict --help"""

from dist_vlcl.commands.predict import main

if __name__ == "__main__":
    main()
