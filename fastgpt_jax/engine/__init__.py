"""The engine: requests, slots, the scheduler, the runner of compiled steps, and what comes out of them."""
