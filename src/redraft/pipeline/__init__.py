"""The main job and its stages, in a run folder."""
