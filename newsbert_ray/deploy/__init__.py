"""Running on a cluster: submitting to one, and looking whether a machine is fit for it."""
