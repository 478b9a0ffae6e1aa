"""How tools end. Imports nothing, so that an interrupt finds the command line ready for it from the start."""

EXIT_USER_ERROR = 2
EXIT_INTERRUPT = 130
EXIT_BROKEN_PIPE = 141
