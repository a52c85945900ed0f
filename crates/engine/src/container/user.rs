//! Who runs in a container: `--user` looked up in the container's own `/etc/passwd` and `/etc/group`.

use crate::error::{Error, Result};

/// A resolved user.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Account {
            name,
            uid,
            gid,
            home: fields.nth(1).unwrap_or(""),
        })
    })
}

fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or("")))
    })
}

/// Resolves `user[:group]`, names or numbers, with the further groups `add`.
///
/// # Errors
/// [`Error::Invalid`] in runc's words where a name is in neither file.
pub(crate) fn resolve(text: &str, add: &[String], passwd: &str, group: &str) -> Result<User> {
    let (user, group_wanted) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let number = user.parse::<u32>().ok();
    let wanted = |account: &Account<'_>| {
        if user.is_empty() {
            account.uid == 0
        } else {
            account.name == user || Some(account.uid) == number
        }
    };
    let mut result = User {
        home: "/".into(),
        ..User::default()
    };
    match (accounts(passwd).find(wanted), number) {
        (Some(account), _) => {
            result.uid = account.uid;
            result.gid = account.gid;
            if !account.home.is_empty() {
                result.home = account.home.into();
            }
            if group_wanted.is_none() {
                let member = |list: &str| list.split(',').any(|name| name.trim() == account.name);
                result.groups = groups(group)
                    .filter(|(_, _, members)| member(members))
                    .map(|(_, gid, _)| gid)
                    .collect();
            }
        }
        (None, Some(uid)) => result.uid = uid,
        (None, None) if user.is_empty() => result.home = "/root".into(),
        (None, None) => {
            return Err(Error::Invalid(format!(
                "unable to find user {user}: no matching entries in passwd file"
            )));
        }
    }
    let find_group = |name: &str| -> Result<u32> {
        if let Some((_, gid, _)) = groups(group).find(|(known, _, _)| *known == name) {
            return Ok(gid);
        }
        name.parse().map_err(|_| {
            Error::Invalid(format!(
                "Unable to find group {name}: no matching entries in group file"
            ))
        })
    };
    if let Some(name) = group_wanted {
        result.gid = find_group(name)?;
    }
    // The primary group too: a program that gives it up must not gain what members of it may not (CVE-2022-36109).
    result.groups.retain(|gid| *gid != result.gid);
    result.groups.insert(0, result.gid);
    for name in add {
        let gid = find_group(name)?;
        if !result.groups.contains(&gid) {
            result.groups.push(gid);
        }
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv:/bin/sh\nbroken\n";
    const GROUP: &str = "root:x:0:root\nweb:x:34:\nlog:x:4:web,root\n";

    #[test]
    fn names_numbers_and_groups_are_found() {
        let user = |text, add: &[&str]| {
            let add: Vec<String> = add.iter().map(|a| a.to_string()).collect();
            resolve(text, &add, PASSWD, GROUP)
        };
        let web = user("web", &["9"]).unwrap();
        assert_eq!(
            (web.uid, web.gid, web.groups, web.home.as_str()),
            (33, 34, vec![34, 4, 9], "/srv")
        );
        assert_eq!(user("33:log", &[]).unwrap().gid, 4);
        let unknown = user("1000", &[]).unwrap();
        assert_eq!(
            (unknown.uid, unknown.gid, unknown.home.as_str()),
            (1000, 0, "/")
        );
        assert_eq!(user("", &[]).unwrap().groups, [0, 4]);
        assert!(
            user("nobody-here", &[])
                .unwrap_err()
                .to_string()
                .contains("no matching entries in passwd file")
        );
    }

    proptest! {
        #[test]
        fn hostile_files_do_not_panic(passwd in ".{0,80}", group in ".{0,80}", text in ".{0,20}") {
            let _ = resolve(&text, &[], &passwd, &group);
        }
    }
}
