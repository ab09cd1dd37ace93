//! Who uses this program, for people.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The user under whom this process runs, such as `root`; and whoever logged in before becoming that one, such as
/// `root (alice)`, if the kernel knows (`loginuid` of proc_pid_loginuid(5)). Users without a name in /etc/passwd are
/// `uid 1000`.
pub fn user_name() -> String {
    let user = rustix::process::geteuid().as_raw();
    shown(user, Some(Path::new("/proc/self")))
}

/// The same of another process on this machine, such as the one at the other end of a unix socket. Its user is the
/// kernel's word; who logged in is left out if the process is gone, or cannot be seen.
pub fn user_of(uid: u32, pid: Option<i32>) -> String {
    let process = pid.map(|pid| PathBuf::from(format!("/proc/{pid}")));
    // A process that has the number of one that is gone is at least of the same user.
    let same = process.filter(|it| fs::metadata(it).is_ok_and(|it| it.uid() == uid));
    shown(uid, same.as_deref())
}

fn shown(user: u32, process: Option<&Path>) -> String {
    let passwd = fs::read("/etc/passwd").unwrap_or_default();
    let passwd = String::from_utf8_lossy(&passwd);
    let login = process.and_then(|it| fs::read_to_string(it.join("loginuid")).ok());
    let login = login.and_then(|it| it.trim().parse().ok());
    described(&passwd, user, login)
}

fn described(passwd: &str, user: u32, login: Option<u32>) -> String {
    let name = name_of(passwd, user);
    match login {
        // The kernel's word for nobody having logged in.
        Some(login) if login != u32::MAX && login != user => {
            format!("{name} ({})", name_of(passwd, login))
        }
        _ => name,
    }
}

/// passwd(5): name, password, number and more, with colons between.
fn name_of(passwd: &str, user: u32) -> String {
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let number = fields.nth(1)?.parse();
        (number == Ok(user)).then_some(name)
    });
    name.map_or_else(|| format!("uid {user}"), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_names() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\n\n:x:7:\nbad\nalice:x:1000:1000::/:/bin/sh\n";
        assert_eq!(described(passwd, 0, None), "root");
        assert_eq!(described(passwd, 0, Some(0)), "root");
        assert_eq!(described(passwd, 0, Some(u32::MAX)), "root");
        assert_eq!(described(passwd, 0, Some(1000)), "root (alice)");
        assert_eq!(described(passwd, 1000, Some(1000)), "alice");
        assert_eq!(described(passwd, 7, Some(8)), "uid 7 (uid 8)");
        assert_eq!(described("", 3, None), "uid 3");
    }

    #[test]
    fn other_processes_are_known() {
        let user = rustix::process::geteuid().as_raw();
        let pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(user_of(user, Some(pid)), user_name());
        // Nobody's process, and another user's.
        for pid in [None, Some(0), Some(i32::MAX), Some(pid)] {
            assert_eq!(user_of(4_000_000_000, pid), "uid 4000000000");
        }
    }
}
