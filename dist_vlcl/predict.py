"""`python -m dist_vlcl.predict` is `dist-vlcl predict`."""

from dist_vlcl.commands.predict import main

if __name__ == "__main__":
    main()
