//! All containers, by id and by name.

use std::collections::HashMap;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::container::record::Container;
use crate::error::{Error, Result};

/// The table of containers.
#[derive(Default)]
pub(crate) struct Inventory {
    tables: RwLock<Tables>,
}

#[derive(Default)]
struct Tables {
    containers: HashMap<String, Arc<Container>>,
    /// Name to id; a name is reserved before its container is in the table.
    names: HashMap<String, String>,
}

impl Inventory {
    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// By id, name, or unique beginning of an id.
    ///
    /// # Errors
    /// [`Error::NoSuchContainer`], [`Error::AmbiguousContainer`].
    pub fn find(&self, reference: &str) -> Result<Arc<Container>> {
        let none = || Error::NoSuchContainer(reference.to_owned());
        let tables = self.read();
        if let Some(container) = tables.containers.get(reference) {
            return Ok(container.clone());
        }
        let name = reference.strip_prefix('/').unwrap_or(reference);
        if let Some(container) = tables
            .names
            .get(name)
            .and_then(|id| tables.containers.get(id))
        {
            return Ok(container.clone());
        }
        if reference.is_empty() || !reference.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(none());
        }
        let mut matching = tables
            .containers
            .values()
            .filter(|container| container.id.starts_with(reference));
        match (matching.next(), matching.next()) {
            (Some(one), None) => Ok(one.clone()),
            (Some(_), Some(_)) => Err(Error::AmbiguousContainer(reference.to_owned())),
            (None, _) => Err(none()),
        }
    }

    /// By whole id.
    pub fn get(&self, id: &str) -> Option<Arc<Container>> {
        self.read().containers.get(id).cloned()
    }

    /// Takes a name for an id.
    ///
    /// # Errors
    /// [`Error::NameInUse`].
    pub fn reserve(&self, name: &str, id: &str) -> Result<()> {
        let mut tables = self.write();
        match tables.names.get(name) {
            Some(owner) if owner != id => Err(Error::NameInUse {
                name: name.to_owned(),
                id: owner.clone(),
            }),
            _ => {
                tables.names.insert(name.to_owned(), id.to_owned());
                Ok(())
            }
        }
    }

    /// Gives a name back, if this id has it.
    pub fn free(&self, name: &str, id: &str) {
        let mut tables = self.write();
        if tables.names.get(name).is_some_and(|owner| owner == id) {
            tables.names.remove(name);
        }
    }

    pub fn insert(&self, container: Arc<Container>) {
        self.write()
            .containers
            .insert(container.id.clone(), container);
    }

    pub fn remove(&self, id: &str) {
        let mut tables = self.write();
        tables.containers.remove(id);
        tables.names.retain(|_, owner| owner != id);
    }

    /// All, newest first.
    pub fn all(&self) -> Vec<Arc<Container>> {
        let mut all: Vec<Arc<Container>> = self.read().containers.values().cloned().collect();
        all.sort_by_cached_key(|container| std::cmp::Reverse(container.record().created.clone()));
        all
    }
}
