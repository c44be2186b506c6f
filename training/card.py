"""`python -m training.card` makes model cards again; `training/hub/card.py` has the code."""

from training.hub.card import main

if __name__ == "__main__":
    main()
