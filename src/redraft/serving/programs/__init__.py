"""Scripts that run in processes of their own, some by the Python of an engine's environment.

They import nothing of redraft. In a folder of their own, because Python puts a script's folder in front
of its path.
"""
