//! Servers that an NBD client starts: by socket activation and on standard input. Uses nbdinfo and nbdsh.

use std::process::Command;

/// The example server, which cargo builds beside this test.
fn memory_server() -> String {
    let test = std::env::current_exe().expect("a test has a path");
    let target = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
    let server = target.join("examples/memory_server");
    assert!(
        server.exists(),
        "cargo test builds the examples unless told not to"
    );
    server.display().to_string()
}

fn run(program: &str, package: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        // nbdsh runs the first python3 of PATH, which has to be the system's.
        .env("PATH", "/usr/bin:/bin")
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; install the package {package}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {text}{errors}"
    );
    text
}

#[test]
fn socket_activation() {
    let server = memory_server();
    let arguments = ["--size", "--", "[", &server, "--mebibytes", "3", "]"];
    assert_eq!(run("nbdinfo", "libnbd-bin", &arguments).trim(), "3145728");
    let arguments = ["--can", "multi-conn", "--", "[", &server, "]"];
    run("nbdinfo", "libnbd-bin", &arguments);
}

#[test]
fn standard_input() {
    let script = format!(
        "h.connect_command(['{}', '--stdio', '--mebibytes', '2'])\n\
         h.pwrite(b'on stdin', 1000)\n\
         assert h.pread(10, 999) == b'\\0on stdin\\0'\n\
         print(h.get_size())\n\
         h.shutdown()",
        memory_server()
    );
    assert_eq!(
        run("nbdsh", "python3-libnbd", &["-c", &script]).trim(),
        "2097152"
    );
}
