"""What a policy's codes mean and whether its codebook is healthy: `vqbet-codes`.

policies    a checkpoint or a bundle, as the report asks it
use, modes  figures of codes and of their distributions, from arrays alone
report      all figures of one policy, beside demonstrations or a recording
findings    what is healthy and what to change
page        the HTML page
phase1      the few figures that a run's metrics record
"""
