"""`dockerproxy doctor`: is something wrong with this server, and what to do about it.

`Doctor` (`doctor`) reads facts about the machine (`machine`) and the registries (`registries`). `checks` turns each of
them into findings (`findings`), without I/O. The modules are loaded when somebody asks first.
"""
