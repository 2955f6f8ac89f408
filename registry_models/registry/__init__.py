"""The registry itself: its versions, what is new in it, where their files are, what goes wrong with it."""
