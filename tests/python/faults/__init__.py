"""A server that speaks the dialects adapters come from, and breaks them on demand. `fault_server.py` starts it alone."""
