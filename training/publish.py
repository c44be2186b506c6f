"""`python -m training.publish` sends a run to the Hub; `training/hub/publish.py` has the code."""

from training.hub.publish import main

if __name__ == "__main__":
    main()
