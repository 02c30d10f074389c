"""One config file for each row of Table 3; `common.py` holds what they share."""
