"""Whether a contribution takes part: sound by itself, and not an outlier in its cohort."""
