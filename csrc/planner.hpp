// Plans of grouped steps and counter-based iteration tables.
#pragma once
