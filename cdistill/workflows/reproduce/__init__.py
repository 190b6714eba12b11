"""The claims of the paper: experiments, outcomes, verdicts and figures."""
