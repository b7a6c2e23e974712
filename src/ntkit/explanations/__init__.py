"""Why a network said something: what each training example added to a prediction, and what would change without it."""
