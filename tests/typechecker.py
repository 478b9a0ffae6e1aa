"""The run-time type checker that the import hook of `conftest.py` puts on our functions."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float
