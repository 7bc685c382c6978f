"""Studies: arms x seeds, the audit, the statistics, and the report; what is finished is read without torch."""
