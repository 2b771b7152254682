"""Bridge to lmms-eval (extra ``eval``): our models for its tasks, its tasks for local files, its results checked."""
