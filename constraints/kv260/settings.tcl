# SPDX-License-Identifier: Apache-2.0
# Procedures that every step uses. Parameters come from the environment (python -m hw.vivado sets them), facts go to a file.

# Returns the parameter GRISTMILL_$name; an error if it is not set.
proc setting {name} {
    set key GRISTMILL_$name
    if {![info exists ::env($key)] || $::env($key) eq ""} {
        error "$key is not in the environment; python -m hw.vivado sets it"
    }
    return $::env($key)
}

# The parameter has one file name per line, so that names may have spaces.
proc setting_files {name} {
    return [split [string trim [setting $name]] \n]
}

# Writes a result for the Python side, one per line: name, tab, value.
proc fact {name value} {
    set file [open [file join [setting REPORTS] facts.txt] a]
    puts $file "$name\t$value"
    close $file
}

proc project_file {} {
    return [file join [setting WORK] project gristmill.xpr]
}

# Starts a run and waits for it; an error unless it is complete.
proc complete_run {name args} {
    launch_runs $name -jobs [setting JOBS] {*}$args
    wait_on_run $name
    if {[get_property PROGRESS [get_runs $name]] ne "100%"} {
        error "run $name ended as: [get_property STATUS [get_runs $name]]"
    }
}
