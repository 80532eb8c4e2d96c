"""Attacks on the daemon over real sockets, a module or more for each attacker of SECURITY.md."""
