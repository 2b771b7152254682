"""One file a model family: where its parts are and how its images become tokens."""
