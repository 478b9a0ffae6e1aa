"""Other engines on this machine's CPU, measured beside ours: their environment, their models, a worker process each."""
