//! A Linux guest in QEMU whose network ends at this machine's loopback addresses. `tests/guest/` has
//! what it is made of and what it does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::binaries::tool;
use crate::programs::Running;

/// A guest; ended when dropped.
pub struct Guest {
    running: Running,
    dir: TempDir,
}

impl Guest {
    /// Makes the guest if it is not made yet, and boots it. Each parameter is a variable of its scripts.
    ///
    /// # Panics
    /// If it cannot be made or QEMU not be run.
    pub fn boot(parameters: &[(&str, &str)]) -> Guest {
        let files = made();
        let dir = tempfile::tempdir().expect("the test directory can be used");
        let words = parameters
            .iter()
            .map(|(name, value)| format!(" pss.{name}={value}"));
        let line = format!(
            "console=ttyS1 panic=-1 net.ifnames=0{}",
            words.collect::<String>()
        );
        // The kernel cuts off what is longer, without a word.
        assert!(line.len() < 2048, "{line}");
        // KVM is there on some machines and works on fewer: it is used where one asks for it.
        let accelerator = std::env::var("PSS_TEST_ACCEL").unwrap_or("tcg,thread=multi".to_owned());
        let mut command = Command::new(tool("qemu-system-x86_64", "qemu-system-x86"));
        command.args(["-accel", &accelerator, "-cpu", "max", "-smp", "2"]);
        command.args(["-m", "1G", "-display", "none", "-nodefaults", "-no-reboot"]);
        command.arg("-kernel").arg(files.join("vmlinuz"));
        command.arg("-initrd").arg(files.join("initramfs"));
        command.args(["-append", &line]);
        command.args(["-serial", "stdio", "-serial"]);
        command.arg(format!("file:{}", dir.path().join("kernel").display()));
        command.args(["-netdev", "user,id=network", "-device"]);
        command.arg("virtio-net-pci,netdev=network");
        command.stdin(std::process::Stdio::null());
        Guest {
            running: Running::start(&mut command),
            dir,
        }
    }

    /// The next line that the guest says.
    ///
    /// # Panics
    /// If it does not say anything in time, or has ended; with everything that it has said.
    #[track_caller]
    pub fn line(&mut self, within: Duration) -> String {
        let line = self.running.wait_for("", within);
        line.trim_end().to_owned()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let kernel = fs::read(self.dir.path().join("kernel")).unwrap_or_default();
            println!("--- kernel\n{}", String::from_utf8_lossy(&kernel));
        }
    }
}

/// The directory with the guest's kernel and initramfs.
fn made() -> PathBuf {
    let target = std::env::current_exe().expect("a process knows its own program");
    // target/PROFILE/deps/NAME
    let target = target
        .ancestors()
        .nth(3)
        .expect("it is in the target directory");
    let files = target.join("guest");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/build.sh");
    let status = Command::new("bash").arg(script).arg(&files).status();
    let status = status.expect("bash can be run");
    assert!(status.success(), "the guest cannot be made: see above");
    files
}
